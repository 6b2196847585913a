-- question: Which tokens did the student choose that the teacher finds least likely, compared with the student?
-- parameter num INTEGER = 20: rows
-- parameter before INTEGER = 12: tokens of context shown before the token
-- column run: run id
-- column index: trajectory
-- column position: position in the response, from 0
-- column version: policy version that sampled it
-- column prompt: text of the prompt
-- column context: text of the tokens before
-- column token: text of the token
-- column student_logprob: log p_old, nats
-- column teacher_logprob: log q, nats
-- column kl_nats: their difference, nats
-- Not from `tokens`: its lists come along, so that no file is opened a second time for the text.
WITH own AS (SELECT run, index, sampled_logprobs FROM score_rows WHERE origin = 'run'),
placed AS (
    SELECT t.*, own.sampled_logprobs, unnest(range(t.num_tokens)) AS position
    FROM trajectory_rows AS t JOIN own USING (run, index)
), worst AS (
    SELECT run, index, position, prompt_ids, response_ids, version_run_versions, version_run_lengths,
        behaviour_logprobs[position + 1] AS student_logprob, sampled_logprobs[position + 1] AS teacher_logprob,
        student_logprob - teacher_logprob AS kl_nats
    FROM placed WHERE kl_nats IS NOT NULL ORDER BY kl_nats DESC, run, index, position LIMIT $num
)
SELECT run, index, position,
    flatten(list_transform(list_zip(version_run_versions, version_run_lengths),
                           lambda of_run: repeat([of_run[1]], of_run[2])))[position + 1] AS version,
    text_of(run, prompt_ids) AS prompt,
    text_of(run, response_ids[greatest(position - $before, 0) + 1 : position]) AS context,
    text_of(run, response_ids[position + 1 : position + 1]) AS token,
    student_logprob, teacher_logprob, kl_nats
FROM worst
ORDER BY kl_nats DESC, run, index, position
