"""One model through its whole life: stages (tiny.py), the tasks that it learns (tasks.py) and a config for each run."""
