# SPDX-License-Identifier: Apache-2.0
"""What every station shares: placements, plans, rounds, topology. NumPy only."""
