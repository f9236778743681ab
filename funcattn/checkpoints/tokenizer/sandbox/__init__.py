"""Code of the process that renders chat templates: jinja2 and the standard library only.

That process is started as `python -I -S` and imports this folder without funcattn, so modules here
import only each other.
"""
