"""The door of a checkout.

python train.py                                    all stages of ablation=both on the embedded world
python train.py stage=1
python train.py -m ablation=none,text,noise,both   Table 3
python train.py resume=latest                      resume the newest unfinished run or sweep
python train.py --cfg job                          print what a command line amounts to
"""

import sys

from povid.run.command import main

if __name__ == "__main__":
    sys.exit(main())
