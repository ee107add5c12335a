"""Models made ready for zeroth-order training: quantised layers, rounding in the forward, adapters, interventions."""
