"""Update rules and their schedules."""

OPTIMIZERS = {
    "adamw": "modelwright.optim.build:make_adamw",
    "muon": "modelwright.optim.build:make_muon",
}

SCHEDULES = {
    "constant": "modelwright.optim.schedule:constant",
    "linear": "modelwright.optim.schedule:linear",
    "cosine": "modelwright.optim.schedule:cosine",
    "wsd": "modelwright.optim.schedule:wsd",
}
