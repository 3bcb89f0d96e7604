"""BOAT as in ``run_boat.py``, with step sizes that fall as those of ours do, by ``LambdaLR`` of torch on both of its optimizers."""

from run_boat import main

if __name__ == "__main__":
    main(step_size=0.3, lr=600.0, y_hat_lr=0.9, u1=5.0, falling=True)
