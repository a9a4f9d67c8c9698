"""Networks in files: opened, made of modules, saved; for the command line."""
