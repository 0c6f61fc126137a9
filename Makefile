# `make demo` runs the main job, `make test` the checks; each builds .venv first, with Python >= 3.11 and pip only.
PYTHON ?= python3

.PHONY: demo test docs clean

demo: .venv/.installed
	.venv/bin/adaptvit demo

test: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest -n 2 --dist worksteal

docs: .venv/.installed
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	made=$$(mktemp -d) && .venv/bin/mkdocs build --strict -f docs/mkdocs.yml -d $$made && rm -rf site && mv $$made site

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet uv || true
	.venv/bin/uv pip install --compile-bytecode --python .venv/bin/python -c constraints.txt -e '.[all,dev,flax]' \
		|| .venv/bin/python -m pip install -c constraints.txt -e '.[all,dev,flax]'
	touch $@

clean:
	rm -rf .venv runs site
