"""`make chaos KILLS=20`: kill random parts of a real run at random moments, and prove that nothing was lost.

runs      a small run that can be repeated bit for bit, its replay and its undisturbed twin
worlds    who runs the roles and starts them again: this process (plain), or Prefect and its user (stack)
observer  looks at storage from outside: what became durable when, which step was trained when
strikes   the loop: choose a victim, strike, wait for the next trained step
verdict   what must hold at the end; compares with the replay and with the twin
cleanup   a process that outlives all of this, and leaves nothing of it
"""
