"""Update rules and their schedules."""

OPTIMIZERS = {
    "adamw": "modelwright.optim.build:make_adamw",
    "adamw8bit": "modelwright.optim.build:make_adamw8bit",
    "paged_adamw": "modelwright.optim.build:make_paged_adamw",
    "paged_adamw8bit": "modelwright.optim.build:make_paged_adamw8bit",
    "adafactor": "modelwright.optim.build:make_adafactor",
    "lion": "modelwright.optim.build:make_lion",
    "muon": "modelwright.optim.build:make_muon",
}

SCHEDULES = {
    "constant": "modelwright.optim.schedule:constant",
    "linear": "modelwright.optim.schedule:linear",
    "cosine": "modelwright.optim.schedule:cosine",
    "wsd": "modelwright.optim.schedule:wsd",
}
