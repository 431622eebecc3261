"""What the documentation takes from the code: pages of methods, of commands and of the Python API, and figures."""
