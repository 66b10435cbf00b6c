# SPDX-License-Identifier: Apache-2.0
"""A server of the tiny model balances itself under traffic whose domain changes: ``python -m examples.demo``."""
