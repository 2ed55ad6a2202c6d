"""The largest sizes that a model's configuration, and so a bundle's manifest, may name.

They are far beyond any model that was published; what is past one of them would only be allocated in vain.
"""

LARGEST_VOCABULARY = 2**22
LONGEST_SEQUENCE = 2**24
LARGEST_MEMORY = 2**20
"""Entries of the working memory."""
MOST_MODULES = 256
"""Reasoning steps, branches and evaluation rounds: each is a module, traced one by one."""
