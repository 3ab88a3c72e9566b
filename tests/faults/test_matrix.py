"""The fault matrix of issue 3: what is broken, and which test shows that nothing comes of it.

Those of this folder break a whole deployment of real processes (`field.Field`, `stack.Stack`), and end with one oracle
(`oracle.wrong`, and `workers/tally.py`, which it asks): every event is accepted and answered once, or dropped as a
duplicate, or set aside as a dead letter, each rightly and in the order of its partition, and no lag is left.

`make test` runs a short form on the embedded broker; `make test-kafka` the whole on Apache Kafka. "whole" marks what
runs there alone.

 1  ingest killed after Temporal has the event, before the commit
    test_ingest_faults.py::test_killed_after_temporal_has_it_and_before_the_commit
    ../integration/test_ingest.py::test_killed_between_accept_and_commit_it_delivers_again
 2  the same, and the agent has continued as new in between
    test_ingest_faults.py::test_killed_after_temporal_has_it_and_before_the_commit
    ../workflows/test_continue_as_new.py::test_an_agent_goes_on_through_many_runs_as_if_they_were_one
 3  the same, and the agent's workflow was closed in between: hibernated, or stopped
    test_ingest_faults.py::test_killed_after_temporal_has_it_and_before_the_commit
 4  Temporal has the event, and its answer is lost
    test_ingest_faults.py::test_temporal_has_it_and_its_answer_is_lost
 5  Temporal killed, and away for a while
    test_server_faults.py::test_temporal_is_killed_and_stays_away
    ../integration/test_ingest.py::test_temporal_away_delays_and_loses_nothing
 6  an outage longer than a member of the group may go without polling, or without a heartbeat
    test_server_faults.py::test_an_outage_longer_than_the_longest_time_between_polls
    test_server_faults.py::test_temporal_is_killed_and_stays_away
 7  brokers restarted, leaders and coordinators moved (whole)
    test_server_faults.py::test_brokers_go_down_one_after_another
    ../integration/test_apache_kafka.py::test_leaders_and_coordinators_move_and_nothing_is_lost
    ../integration/test_apache_kafka.py::test_a_node_is_killed_and_comes_back
    ../integration/test_apache_kafka.py::test_all_nodes_are_restarted_one_after_another
    ../integration/test_apache_kafka.py::test_a_cluster_that_hangs_is_waited_for
 8  members of the group come and go (whole: many times, and killed)
    test_group_faults.py::test_workers_come_and_go
 9  a member is frozen beyond its session, and goes on
    test_group_faults.py::test_a_worker_that_was_frozen_for_longer_than_its_session
10  a producer sends an event again, with a new offset
    test_ingest_faults.py::test_what_a_producer_sends_again_is_dropped
11  dead letters redriven (whole); topics deleted and made anew
    test_server_faults.py::test_a_dead_letter_is_redriven
    test_server_faults.py::test_topics_are_made_anew
    ../integration/test_dlq.py::test_a_redriven_event_keeps_its_identity_and_is_taken_once_its_agent_is_there
12  poison of all kinds
    test_load_faults.py::test_poison_of_all_kinds_between_good_letters
    ../integration/test_ingest.py::test_poison_is_dead_lettered_byte_for_byte_and_its_neighbours_do_not_notice
    ../integration/test_ingest.py::test_an_event_temporal_never_takes_is_dead_lettered_alone
13  one hot agent; more than Temporal takes for one run
    test_load_faults.py::test_one_hot_agent_does_not_keep_others_waiting
    test_load_faults.py::test_more_for_one_agent_than_temporal_takes_for_a_run
14  the model worker killed in the middle of a call
    test_kill.py::test_a_process_that_is_killed_during_a_turn_costs_nothing
    test_kill.py::test_what_was_done_and_not_yet_reported_is_not_done_again
15  the model's server refuses, breaks, hangs: left to the issue on models, and partly held by
    ../activities/test_endpoints.py::test_what_may_pass_or_be_mended_is_retried_later
    ../activities/test_endpoints.py::test_the_servers_retry_after_is_kept
    ../activities/test_endpoints.py::test_a_server_that_hangs_is_given_up_after_the_pools_timeout
16  a reply is on its topic, and the broker's answer is lost
    test_server_faults.py::test_a_reply_is_on_its_topic_and_the_broker_is_not_heard
17  clocks an hour wrong (whole)
    test_ingest_faults.py::test_clocks_that_are_wrong
18  new workflow code, with live agents: left to the issue on deploys, and partly held by
    ../workflows/test_replay.py::test_a_recorded_history_replays
19  SIGTERM
    test_ingest_faults.py::test_asked_to_stop_it_drains_and_leaves_and_commits_all_that_it_may
    test_exit_status.py::test_a_worker_that_has_worked_ends_with_status_0_in_20_of_20_tries
20  Temporal's disk is full (whole)
    test_server_faults.py::test_temporals_disk_is_full
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent


def test_the_matrix_has_twenty_cases_and_names_tests_that_exist() -> None:
    """A test that is renamed is renamed here, too."""
    table = str(__doc__)
    assert [int(number) for number in re.findall(r"^ ?(\d+)  ", table, re.MULTILINE)] == list(range(1, 21))
    named = re.findall(r"^    (\S+\.py)::(\w+)$", table, re.MULTILINE)
    assert len(named) == table.count("::")
    for file, test in named:
        body = ast.parse((HERE / file).read_text()).body
        assert test in {node.name for node in body if isinstance(node, ast.AsyncFunctionDef)}, file
