"""What runs in the process that renders chat templates: jinja2 and the standard library, nothing of funcattn.

That process is started as `python -I -S` and imports this folder by itself, so each module here imports only its neighbours.
"""
