"""Where ranks may meet, unless somebody says."""

from __future__ import annotations

RANK_PORTS = range(20000, 32000)  # below what Linux gives to outgoing connections
