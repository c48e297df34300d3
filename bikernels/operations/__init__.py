"""The public operations, one file each: check the operands, make a spec of them, launch what a backend prepared."""
