# SPDX-License-Identifier: Apache-2.0
"""Transfer of expert weights from slot to slot, through staging."""
