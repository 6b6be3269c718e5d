"""`vernier plan`: parameters, memory by part, tokens a step, time and scaling, before a run is started.

`estimate` holds what a run asks for against what there is; `report` words it. No rank is started for it.
"""
