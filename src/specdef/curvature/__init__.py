"""The spectrum of a loss: Hessian, GGN and Fisher as operators, Lanczos, density, traces, and the papers' bounds."""
