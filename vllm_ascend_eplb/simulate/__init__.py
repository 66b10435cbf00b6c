# SPDX-License-Identifier: Apache-2.0
"""Simulation of balancing on a recorded load, in tokens and in time."""
