"""Campaigns: many short training runs that differ in a few keys, searched by Ray Tune, ending in an answer.

    space        the file: question, space, budget; what may change when it is taken up again
    admission    how many trials fit beside each other, so that one that has begun can always finish
    journal      what has happened, line by line: the truth from which an interrupted campaign goes on
    proposals    which point is tried next
    schedulers   Ray Tune's, each decision written down before it takes effect
    trial        what runs in a trial's own process
    population   how a trial goes on from another trial's weights
    engine       search, confirm, compare, publish
    results, pictures, report, live     what people see
"""
