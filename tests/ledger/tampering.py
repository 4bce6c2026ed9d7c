"""Somebody changes the tables behind the ledger's back."""

from __future__ import annotations

from ledger.store.client import Store


def rewrite(store: Store, table: str, where: str = "false", **columns: str) -> None:
    """Delete the rows of a condition, or give their columns other values. At once: a mutation takes its time, up to minutes."""
    replaced = ", ".join(f"if({where}, {value}, {name}) AS {name}" for name, value in columns.items())
    kept = "true" if columns else f"NOT ({where})"
    store.command(f"CREATE TABLE {table}_changed AS {table}")
    store.command(
        f"INSERT INTO {table}_changed SELECT * {f'REPLACE ({replaced})' if columns else ''} FROM {table} WHERE {kept}"
    )
    store.command(f"EXCHANGE TABLES {table}_changed AND {table}")
    store.command(f"DROP TABLE {table}_changed")
