.PHONY: install test bench smoke lint format

install:
	pip install -e '.[dev]'

test:
	pytest

bench:
	pytest bench/ --benchmark-only

smoke:
	pytest bench/ --benchmark-disable

lint:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .
