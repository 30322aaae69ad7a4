"""Ideas of our own for POVID: one file each here, and one YAML each in conf/."""
