"""The arena: methods compared at settings that one rule chose for each of them (conf/arena.yaml)."""
