"""Ray's environment in the tests: the loopback address only, and no usage reports."""

from __future__ import annotations

import os

# Read by Ray when it is first imported; the second one is named for the systems where it is the default.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# With gRPC's fork support, Ray's client server sometimes loses a process that it starts.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
