"""Every file that a run leaves for people and programs: result, lock, recipe, evaluations."""
