# SPDX-License-Identifier: Apache-2.0
"""The fourth station: expert weights from slot to slot, through staging."""
