# SPDX-License-Identifier: Apache-2.0
"""Files that the package reads and writes: map files, traces, the private folder of a run."""
