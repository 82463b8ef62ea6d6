"""The signs by which `causes` tells one fault from another.

Each function looks at the evidence and says what it saw, as the sentence that a diagnosis gives, or returns None.
"""
