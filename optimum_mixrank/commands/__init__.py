"""`optimum-cli mixrank …`. Nothing heavy is imported before a command runs."""
