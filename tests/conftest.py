# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests."""

import signal

# A shell that starts a job in the background makes it ignore Ctrl-C, and its children inherit that. Tests interrupt
# programs, so they must not depend on how they were started themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
