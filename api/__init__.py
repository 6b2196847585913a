"""The service: launch, watch and inspect runs over REST and in the browser.

main      create_app: settings -> FastAPI; the process       deps      the parts that routes share; who may ask
schemas   every request and answer, with examples            limits    settings; sizes, rates, origins, headers
problems  errors as RFC 9457 problem details                 launcher  runs start and stop through Prefect
runs, observe, trajectories, sql, health      the routes

    storage --RunView: one look serves all--> reader, observe --> JSON
                                         --> Feed, once an event: Hub --> every stream

It reads storage and starts deployments by name; it imports neither flows nor torch. Killing it loses nothing.
"""
