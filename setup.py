"""Finds the packages. pyproject.toml has everything else, and the versions of all dependencies that work."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["hstu", "hstu.*"]), "hstu_scripts", "hstu_configs"])
