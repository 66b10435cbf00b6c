# SPDX-License-Identifier: Apache-2.0
"""What balancing would bring for recorded load, in tokens and in time."""
