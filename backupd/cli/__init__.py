"""The command-line interface, with one module per command; the only package that prints for people."""

from backupd.cli.app import main as main
