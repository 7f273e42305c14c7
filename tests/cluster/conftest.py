"""Ray as the tests run it: on the loopback address only, and telling nobody."""

from __future__ import annotations

import os

# Read by Ray when it is first imported; the second one is named for the systems where it is the default.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# Where gRPC handles forks, Ray's server for clients loses a process that it starts now and then.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
