"""Measurements that anyone can run from a checkout: `python -m bench` lists them, `python -m bench NAME` runs one."""
