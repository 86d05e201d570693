"""The command line `jax-mla`: one small file a command, imported when chosen."""
