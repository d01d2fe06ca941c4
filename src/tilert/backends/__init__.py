"""What runs a program: the interpreter (its definition) and the machines. Knows no compiler."""
