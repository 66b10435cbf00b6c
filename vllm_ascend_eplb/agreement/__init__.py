# SPDX-License-Identifier: Apache-2.0
"""The third station: every rank learns the same facts at the same step."""
