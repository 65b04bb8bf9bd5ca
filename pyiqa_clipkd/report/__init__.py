"""Results as one page for a browser: `pyiqa-clipkd report`."""
