"""The ground floor, which knows neither models nor methods: processes, files, hooks, precision and logging."""
