"""How work is wired: a recipe becomes a plan, a plan becomes a Prefect flow.

- `recipe.py`    recipes and their nodes; finding and loading one
- `document.py`  YAML that remembers its lines
- `build.py`     the document to nodes, everything checked, every error with its line
- `expand.py`    `matrix:` to single nodes
- `plan.py`      keys, cache states, disk need, `why`
- `run.py`       the Prefect flow
- `worker.py`    the process that computes
- `up.py`, `tether.py`       a server and a worker under one supervisor
- `deployment.py`            what the server has to know, and the automations that go on after a crash
- `submit.py`, `submitted.py`  a recipe on its way to a worker, and the flow that the worker starts
- `prefect_server.py`        whether there is a server, and quiet settings
- `terminal.py`  what a person sees while it runs
- `cli.py`, `cli_store.py`, `cli_server.py`  the command line
- `recipes/`     recipes that come with the package

Planning and wholly cached runs import neither torch nor (without a configured server) Prefect.
"""
