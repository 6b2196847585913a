-- relation: One row per extra token id whose log-prob was asked for, for every folder of scores that has it; the ids of back-filled candidates are not among them.
-- reads trajectory_rows, score_rows
-- column run: Run id.
-- column index: Trajectory index.
-- column position: Position t in the response, from 0.
-- column source: `head` (student's most likely), `draw` (student's draws), `topk` (teacher's), `teacher_draw`.
-- column rank: 0 for the most likely, or for the first draw.
-- column token_id: Token id; `vocabulary` has its text.
-- column student_logprob: log p_old of the id, nats; null for ids that came from the teacher.
-- column teacher_logprob: log q of the id, nats; null while unscored.
-- column teacher: The teacher; null while unscored.
-- column folder: Folder of the scores; null while unscored.
-- Entry i of a flat list is position i // width and rank i % width.
WITH sampled AS NOT MATERIALIZED (
    -- Back-filled candidates have ids of their own: scores of those speak of other ids than the trajectories'.
    SELECT run, index, s.teacher, s.folder, t.head_k, t.head_ids, t.head_logprobs, s.head_logprobs AS head_teacher,
        t.num_draws, t.draw_ids, t.draw_logprobs, s.draw_logprobs AS draw_teacher
    FROM trajectory_rows AS t
    LEFT JOIN (FROM score_rows WHERE candidates_from = 'trajectories') AS s USING (run, index)
), lists AS NOT MATERIALIZED (
    SELECT run, index, teacher, folder, 'head' AS source, head_k AS width, head_ids AS ids,
        head_logprobs AS student, head_teacher AS scored FROM sampled
    UNION ALL
    SELECT run, index, teacher, folder, 'draw', num_draws, draw_ids, draw_logprobs, draw_teacher FROM sampled
    UNION ALL
    SELECT run, index, teacher, folder, 'topk', topk_k, topk_ids, NULL, topk_logprobs FROM score_rows
    UNION ALL
    SELECT run, index, teacher, folder, 'teacher_draw', num_teacher_draws, teacher_draw_ids, NULL,
        teacher_draw_logprobs FROM score_rows
), entries AS (
    SELECT *, generate_subscripts(ids, 1) - 1 AS i, unnest(ids) AS token_id, unnest(student) AS student_logprob,
        unnest(scored) AS teacher_logprob
    FROM lists WHERE width > 0
)
SELECT run, index, i // width AS position, source, i % width AS rank, token_id, student_logprob, teacher_logprob,
    teacher, folder
FROM entries
