"""The names of a mesh's axes."""

from __future__ import annotations

MESH_AXES = ("data", "fsdp", "tensor", "expert", "stage", "sequence")
