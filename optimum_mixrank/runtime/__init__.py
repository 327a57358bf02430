"""The ground floor, which knows no model and no method: processes, files, hooks, precision, logging."""
