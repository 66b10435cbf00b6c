# SPDX-License-Identifier: Apache-2.0
def memcpy(*args: object) -> int:
    raise NotImplementedError("not emulated: acl.rt.memcpy (sleep mode)")
