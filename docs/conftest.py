"""The pages of this folder are tests, its programs are not: building the docs runs the tutorials."""

collect_ignore = ["conf.py", "gallery.py", "pages.py", "tutorials", "generated", "_build"]
