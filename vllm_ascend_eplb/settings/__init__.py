# SPDX-License-Identifier: Apache-2.0
"""The settings: their schema, their errors, and whether they fit a model and a server."""
