"""`asyncopd chaos`: kill random parts of a real run at random moments, and prove that nothing was lost.

settings  a small run that can be repeated bit for bit
worlds    who runs the roles and starts them again: this process (plain), or Prefect and its user (stack)
witness   watches storage from outside: what became durable when, which step was trained when
ordeal    the loop: choose a victim, strike, wait for the next trained step
verdict   what must hold at the end; compares with a replay and with an undisturbed twin
"""
