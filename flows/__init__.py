"""How work is wired: a recipe becomes a plan, a plan becomes a Prefect flow.

- `recipe.py`    recipes and their nodes; finding and loading one
- `document.py`  YAML that remembers its lines
- `build.py`     the document to nodes, everything checked, every error with its line
- `expand.py`    `matrix:` to single nodes
- `plan.py`      keys, cache states, disk need, `why`
- `run.py`       the Prefect flow
- `worker.py`    the process that computes
- `terminal.py`  what a person sees while it runs
- `cli.py`       the command line
- `recipes/`     recipes that come with the package

Planning and wholly cached runs import neither torch nor (without a configured server) Prefect.
"""
