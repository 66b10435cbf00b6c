# SPDX-License-Identifier: Apache-2.0
"""Values that all stages share: placements, plans, rounds, topology. NumPy only."""
